"""What people said: conversations, pairs, picks and the preferences made of them.

Imports nothing here on purpose: a training child reads ``feedback_store.snapshots`` without loading DuckDB.
"""
