"""The control plane: desired state, the capacity core's loop, the admin API and the console."""
