"""The operators in plain torch, on any device: slow, short, and the specification of every other backend."""
