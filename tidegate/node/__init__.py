"""The node service: carries out the core's commands on one machine and is the sole writer of every replica there."""
