"""Engines: whatever writes the answers, behind one port (`engine.py`), and the slot that holds the served one."""
