"""Engine adapters: how a node starts, watches and ends the programs that compute. Only `assemble` imports them."""
