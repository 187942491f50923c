"""Who may ask now: rates, concurrency, and budgets leased to gateways. Pure; amounts are made in `money`."""
