"""WHAT IS LEARNED: from a snapshot of preferences to a judged, servable version.

The page to read first is `cycle.py`. Importing this package imports neither torch nor trl; only the
child processes (`job.py`, `evaluate.py`) and `base_model.ensure_base` do.
"""
