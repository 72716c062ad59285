"""oqc: a job server for quantum-control pulses that needs nothing but Python."""
__version__ = "1.0.0"
