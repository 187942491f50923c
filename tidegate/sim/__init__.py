"""The simulator: the capacity core and the dispatch that run live, on recorded traffic, simulated nodes and a virtual
clock.
"""
