"""What travels between ranks: messages between pipeline stages, tokens to their experts and back."""

from megatron_ext.comm.dispatch import Dispatcher, DispatchError, DispatchPlan

__all__ = ["DispatchError", "DispatchPlan", "Dispatcher"]
