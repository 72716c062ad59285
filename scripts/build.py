#!/usr/bin/env python3
"""Write dist/oqc.pyz, the whole server in one file, and dist/SHA256SUMS beside it.

    scripts/build.sh [FOLDER]

The same sources give the same bytes, whatever the Python, the umask and the time: so anybody can
build it again and compare. Not by `zipapp`, which takes the time and the order from the folder and
drops the exit status.
"""
import argparse
import hashlib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of oqc/: modules, data and the manual; no bytecode, which is of one Python only.
TAKEN = {".py", ".txt", ".json", ".html", ".md"}
OLDEST = (1980, 1, 1, 0, 0, 0)                  # the first moment that a zip file can write down
SHEBANG = b"#!/usr/bin/env python3\n"
MODE = 0o100644                                 # a plain file, rw-r--r--


def build(file):
    """Write the .pyz to this path."""
    entries = [(path.relative_to(ROOT).as_posix(), path.read_bytes())
               for path in (ROOT / "oqc").rglob("*") if path.suffix in TAKEN]
    entries.append(("__main__.py", (ROOT / "oqc" / "__main__.py").read_bytes()))
    with open(file, "wb") as output:
        output.write(SHEBANG)
        with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
            for name, data in sorted(entries):
                info = zipfile.ZipInfo(name, OLDEST)
                info.create_system = 3              # Unix, also where this is not
                info.external_attr = MODE << 16
                archive.writestr(info, data)
    file.chmod(0o755)


def main():
    """Build, and say what."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", metavar="FOLDER",
                        help="where to write them [dist]")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "oqc.pyz"
    sums = folder / "SHA256SUMS"
    unfinished = folder / "oqc.pyz.new"
    build(unfinished)
    unfinished.replace(file)                    # whoever runs the old one keeps it
    line = f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
    sums.write_text(line, encoding="ascii")
    sums.chmod(0o644)
    print(f"{file}\n{sums}\n{line}", end="")


if __name__ == "__main__":
    main()
