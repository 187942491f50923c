"""Amounts: what usage costs and what may be spent. Pure: policy decides capacity, money decides amounts."""
