"""Every decision, as pure functions and state machines: no await, no clock, no dice, no log. `reconcile` composes."""
