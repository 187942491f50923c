"""Adapters that keep things: the journal of usage records (files), and state, prices and ledger (SQL)."""
