"""`python -m oqc`, and what a double click on oqc.pyz runs."""
import sys

if sys.version_info < (3, 9):
    # An old Python must get this line, not a syntax error.
    # pylint: disable-next=consider-using-f-string # as said
    sys.exit("oqc: needs Python 3.9 or later, and this is Python %d.%d" % sys.version_info[:2])

from oqc.cli import main  # pylint: disable=wrong-import-position # only after that

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
