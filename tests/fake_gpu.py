"""A pretended GPU: CPU tensors that say "cuda:0". An operation that mixes them with CPU tensors raises where
CUDA would refuse, and each time that the host would wait for the device is counted.

    model = fake_gpu.to_gpu(model)
    with fake_gpu.GPU() as gpu:
        ...
    gpu.waits  # {"toy_tools/fast.py:123 tolist": 4}

It stands in for a GPU where none is at hand, and says nothing of speed or of graph capture."""

import os
import sys
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ACTIVE = []    # the GPU contexts that are open
LEAVING = []   # while `.to("cpu")` runs: C++ takes a pretended tensor for a CPU one, and would keep it

# CUDA refuses even a single number in CPU memory here
NO_SCALARS = {"cat", "stack", "gather", "scatter", "scatter_", "index_select", "mm", "bmm", "addmm",
              "baddbmm", "index_copy", "index_copy_", "searchsorted", "embedding", "isin"}
# the size or the value of the result is needed on the host
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2",
         "unique_consecutive", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class DeviceMix(RuntimeError):
    pass


class GpuTensor(torch.Tensor):
    """`inner`, a CPU tensor, as one on the GPU."""

    @staticmethod
    def __new__(cls, inner, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cpu", requires_grad=requires_grad)
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class GPU(TorchDispatchMode):
    """Inside, tensors made with device "cuda" are pretended ones. waits: Counter of waits by line."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __enter__(self):
        self.patches = ExitStack()
        for owner, name, new in [
                (torch, "tensor", tensor), (torch.Tensor, "to", to),
                (torch.Tensor, "cpu", lambda x: to(x, "cpu")), (torch.cuda, "_lazy_init", lambda: None),
                (torch.cuda, "is_bf16_supported", lambda **options: False),  # no autocast
                (torch.cuda, "synchronize", lambda *args: wait("synchronize")),
                (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", grouped)]:
            self.patches.enter_context(mock.patch.object(owner, name, new))
        ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        ACTIVE.remove(self)
        self.patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def to_gpu(model):
    """The module with parameters and buffers on the pretended device, in place; tied ones stay tied."""
    moved = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                there = torch.nn.Parameter(GpuTensor(p.detach().clone()), requires_grad=p.requires_grad)
                module._parameters[name] = moved.setdefault(p, there)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = GpuTensor(buffer.detach().clone())
    return model


def wait(what):
    for gpu in ACTIVE:
        gpu.waits[f"{project_line()} {what}"] += 1


def project_line():
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        # a virtual environment may lie in the folder
        if name.startswith(ROOT + os.sep) and "site-packages" not in name and name != __file__:
            return f"{os.path.relpath(name, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"


def run(func, args, kwargs):
    """One operation of ATen, on what the pretended tensors hold."""
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    gpu = [x for x in tensors if isinstance(x, GpuTensor)]
    cpu = [x for x in tensors if not isinstance(x, GpuTensor)]
    backward = torch._C._current_graph_task_id() != -1
    device = kwargs.get("device")
    makes = device is not None and torch.device(device).type == "cuda"
    makes = makes or backward and device is not None and not tensors  # C++ asks for a CPU tensor
    leaves = name == "_to_copy" and bool(LEAVING)
    if not gpu and not makes:
        return func(*args, **kwargs)
    check(name, args, gpu, cpu)
    count(name, func, args, kwargs, gpu, leaves)

    def inner(x):
        if isinstance(x, GpuTensor):
            return x.inner
        return torch.device("cpu") if isinstance(x, torch.device) else x
    with _disable_current_modes():
        out = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    same = {id(x.inner): x for x in gpu}  # what is changed in place is given back
    stays = not leaves and not (name == "copy_" and not isinstance(args[0], GpuTensor))

    def outer(x):
        if id(x) in same:
            return same[id(x)]
        return GpuTensor(x) if stays and type(x) is torch.Tensor else x
    return tree_map(outer, out)


def check(name, args, gpu, cpu):
    """Raises DeviceMix where CUDA would."""
    if not gpu or not cpu or name in ("copy_", "_to_copy"):
        return
    if name in INDEXING:
        values = args[2:3] if name != "index" else ()
        wrong = not isinstance(args[0], GpuTensor) or any(
            isinstance(x, torch.Tensor) and not isinstance(x, GpuTensor) and x.ndim for x in values)
    else:
        wrong = name in NO_SCALARS or any(x.ndim for x in cpu)
    if wrong:
        raise DeviceMix(f"{name} of CPU and CUDA tensors at {project_line()}")


def count(name, func, args, kwargs, gpu, leaves):
    """Notes what makes the host wait: values that it needs, and copies that are not told not to."""
    copies = name == "_to_copy" and (leaves or not gpu) and not kwargs.get("non_blocking")
    if name == "copy_":
        copies = len(gpu) == 1 and isinstance(args[1], torch.Tensor) and not (*args, False)[2]
    sized = func._overloadname != "Tensor" or "output_size" in kwargs
    by_number = name == "repeat_interleave" and not sized
    indices = [x for x in args[1] if x is not None] if name in INDEXING else []
    by_mask = any(x.dtype == torch.bool for x in indices)
    from_host = any(not isinstance(x, GpuTensor) for x in indices)
    if copies or by_number or by_mask or from_host or name in WAITS:
        wait(name)


TENSOR, TO = torch.tensor, torch.Tensor.to
GROUPED = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype


def grouped(tensors):
    """As torch's own, which asks C++ for the device."""
    here = isinstance(tensors[0][0], GpuTensor)
    return {(CUDA if here else device, dtype): x for (device, dtype), x in GROUPED(tensors).items()}


def is_cuda(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def tensor(data, *, device=None, pin_memory=False, **options):
    """torch.tensor, whose own copy to a device does not come by the dispatcher."""
    if any(isinstance(x, GpuTensor) for x in tree_leaves(data)):
        wait("torch.tensor of CUDA tensors")
        data = tree_map(lambda x: x.inner.tolist() if isinstance(x, GpuTensor) else x, data)
    if not is_cuda(device):
        return TENSOR(data, device=device, **options)
    wait("torch.tensor(device=cuda)")
    with _disable_current_modes():
        return GpuTensor(TENSOR(data, **options))


def to(self, *args, **kwargs):
    """Tensor.to, by what the arguments say of the device."""
    places = [*args, kwargs.get("device"), kwargs.get("other")]
    away = any(isinstance(x, (str, torch.device)) and not is_cuda(x) or type(x) is torch.Tensor
               for x in places)
    if isinstance(self, GpuTensor) and away:
        LEAVING.append(1)
        try:
            return TO(self, *args, **{**kwargs, "copy": True})
        finally:
            LEAVING.pop()
    here = isinstance(self, GpuTensor)
    args = [x.dtype if isinstance(x, GpuTensor) else x for x in args if not is_cuda(x)]
    if here:
        kwargs.pop("device", None)
    elif any(isinstance(x, GpuTensor) or is_cuda(x) for x in places):
        kwargs["device"] = CUDA
    return TO(self, *args, **kwargs) if args or kwargs else self
