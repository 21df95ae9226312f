"""``python -m tests.contracts.seams``: prints the table of the matrix; ``--write`` puts it into docs/reliability.md."""

import sys

from . import table

if sys.argv[1:] == ["--write"]:
    table.write()
else:
    print("\n".join(table.lines()))
