"""How gateway, control and nodes reach each other: adapters of `ports.Link`, `ports.Listener` and `ports.Connect`."""
