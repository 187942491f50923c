"""Where weights come from and where a node keeps them: sources, ranged download, the disk cache of one node."""
