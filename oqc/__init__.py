"""oqc: a job server for quantum-control pulses that needs nothing but Python.

    from oqc import Client
"""
__version__ = "2.0.0"
# pylint: disable-next=undefined-all-variable # see __getattr__
__all__ = ("Client", "Failed", "Unreachable", "KeyRefused", "NotEnded", "ConfigError")


def __getattr__(name):
    """Return what Python programs use; it is imported when first asked for. In a syntax that an old
    Python knows, which is told in a line that it is too old."""
    if name not in __all__:
        raise AttributeError("module 'oqc' has no attribute " + repr(name))
    from oqc import client          # pylint: disable=import-outside-toplevel # as said
    return getattr(client, name)


def __dir__():
    """Return the names that a notebook completes."""
    return sorted(list(globals()) + list(__all__))
