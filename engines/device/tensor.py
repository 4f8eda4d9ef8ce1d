"""A tensor in a device's memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor at an address; answers like an ``OrtValue`` where the engine and the device ask."""

    address: int
    sizes: tuple[int, ...]
    element: int
    """Its number in ``onnx.TensorProto``."""

    def shape(self) -> list[int]:
        return list(self.sizes)

    def data_ptr(self) -> int:
        return self.address

    def element_type(self) -> int:
        return self.element
