"""What travels between ranks: messages between pipeline stages, tokens to their experts and back."""

from megatron_ext.comm.dispatch import Dispatcher, DispatchError, Transit
from megatron_ext.comm.traffic import Traffic

__all__ = ["DispatchError", "Dispatcher", "Traffic", "Transit"]
