"""The ground floor: what things are. No I/O, no clock, no dice, no log; every other floor may import it."""
