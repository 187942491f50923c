"""The advisor: which mode is cheapest for *this* traffic, at *this* latency.

It reads traffic, replays it on every mode and provider of a dated catalogue, and says what to choose and why. It may
use the simulator's models of hardware and traffic; it never touches a running service, an adapter or the network.
"""
