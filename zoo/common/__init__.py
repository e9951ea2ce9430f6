"""The plumbing that is no algorithm: environments, device and compilation, run bookkeeping."""
