"""What happens to the store when processes die and disks fail: real kills, real children, a real (if small) disk.

    kills.py     300 times kill -9 at a random moment under 32 raters        ┐
    steps.py     kill -9 at every step of pick, import, snapshot, …          ├→ docs/benchmarks/faults.md
    failures.py  a disk that is full, read-only, or answers EIO, and heals   ┘
    child.py     what the children do        disk.py, disk.c  the disk that fails, the process that dies at a step

Run all: ``python -m tests.faults [--kills 300] [--short]``. A short form runs with the tests (``test_faults.py``).
Not here: power cuts. That a commit is one fdatasync before its acknowledgement is seen by ``test_database.py``.
"""
