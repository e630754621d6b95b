"""Precompiled PTX kernels: verified, loaded once per process and device, launched on torch's current stream.

The folder ``ptx`` holds the texts and ``manifest.json``, which says what each entry takes and which text suits which
GPU and driver. CUDA is left alone until a function is called with a CUDA device, and ``cuda.core`` always.
"""

import contextlib
import ctypes
import functools
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hinm.kernels.manifest import SLOTS, Entry, Text, must, read_manifest, read_text

FOLDER = Path(__file__).parents[1] / "ptx"  # tests point it at a folder of their own, before the first call
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # of every GPU
MEMOISED = 64  # sizes kept per thread and entry: one for each layer that shares the entry
NEWEST = (99, 99)  # up to which compute capability a text goes that is for all that are to come
LOG_BYTES = 16384  # of the driver's compiler
LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
BINDING_DRIVER = 12000  # has cuGetProcAddress_v2, without which cuda.bindings finds nothing
LEGACY_STREAM = 1  # torch's default stream; with CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM set, 0 is another one
FORKED = "this process was forked from one that had initialised CUDA, so it cannot use it; start it by the spawn method"


def entries() -> Mapping[str, Entry]:
    """Every entry of the manifest, by name.

    Raises:
        ValueError: if the manifest is missing or malformed.
    """
    return read_manifest(FOLDER)[1]


def refusal(device: torch.device) -> str | None:
    """None if the kernels run on that device, else why not and what to do, in one sentence without its full stop.

    Found once per process and device. It raises nothing and never hangs; asked about a CUDA device, it initialises the
    driver, but makes no context.
    """
    return _reason(os.getpid(), _indexed(device))


def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one block can have on that device, static and dynamic together.

    Raises:
        RuntimeError: with ``refusal``'s reason, where there is one.
    """
    return _limit(os.getpid(), _indexed(device))


def prepare(device: torch.device) -> None:
    """Load every kernel for that device, so that launches on it can be captured in a CUDA graph; once is enough.

    The driver compiles the texts; it keeps the result on disk, so only the first process waits (about a second).

    Raises:
        RuntimeError: with ``refusal``'s reason; with the compiler's log if it takes a text amiss; or during a capture.
    """
    if reason := refusal(device):
        raise RuntimeError(reason)
    index = _indexed(device).index
    with _lock:
        if (os.getpid(), index) not in _loaded:
            if _is_capturing():
                raise RuntimeError(
                    f"cuda:{index}: its kernels are not loaded, and cannot be while a CUDA graph is captured. Call "
                    "lightning_hinm.kernels.prepare(device), or run the layer once, before the capture."
                )
            _loaded[os.getpid(), index] = _load(index)


def launch(entry: str, *arguments: Tensor | int | float | None) -> None:
    """Launch an entry where its tensors are, on torch's current stream there; an empty grid is no launch.

    The host does not wait, nothing is allocated on the GPU, and the first launch on a device prepares it. Shapes and
    dtypes are the caller's to check.

    Args:
        entry: its name in the manifest.
        arguments: one for each parameter, in the manifest's order; None is the null pointer.

    Raises:
        ValueError: if the arguments do not fit the parameters, the tensors are not on one CUDA device, grid or shared
            memory are beyond its limits, or the device is not of a kind that has the entry.
        RuntimeError: if the kernels do not run on the device, or CUDA fails to launch.
    """
    call = _here.calls.get(entry) or _here.add(entry)
    index = call.pack(arguments)
    x, y, z, shared = call.sizes(*[arguments[i] for i in call.sized])
    if not x * y * z:
        return
    loaded = _loaded.get((os.getpid(), index))
    if loaded is None:
        prepare(torch.device("cuda", index))
        loaded = _loaded[os.getpid(), index]
    driver, context, functions = loaded
    if entry not in functions:
        raise ValueError(f"{entry}: {_lack(index, call.entry.kernel)}. Launch an entry of another kernel.")
    function, limit = functions[entry]
    if shared > limit:
        got = f"{shared} bytes of shared memory with {call.numbers(arguments)}"
        raise ValueError(f"{entry}: takes {got}, but cuda:{index} has {limit} for it. Run this layer dense.")
    stream = _current_stream(index) or LEGACY_STREAM
    # Not torch's current device but the context is asked for: a thread that has only called torch may have none yet.
    foreign = driver.cuCtxGetCurrent()[1] != context
    if foreign:
        _check(driver.cuCtxPushCurrent(context), f"{entry}: making cuda:{index} current")
    try:
        (error,) = driver.cuLaunchKernel(function, x, y, z, call.block, 1, 1, shared, stream, call.address, 0)
    finally:
        if foreign:
            driver.cuCtxPopCurrent()
    if error:
        got = f"grid {(x, y, z)}, block {call.block}, {shared} bytes of shared memory, {call.numbers(arguments)}"
        raise RuntimeError(f"{entry}: the launch on cuda:{index} failed with {_describe(error)}; {got}.")


class _Call:
    """One entry's arguments in one thread: written in place, because the array of pointers to them is made once."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.block, self.count = entry, entry.block, len(entry.parameters)
        self.names = [parameter.name for parameter in entry.parameters]
        self.pointers = [(i, p.alignment - 1) for i, p in enumerate(entry.parameters) if p.type == "pointer"]
        used = {name for name, _ in (*entry.grid_rules, *entry.shared_rules)}
        self.sized = [i for i, name in enumerate(self.names) if name in used]
        self.sizes = functools.lru_cache(MEMOISED)(self._sizes)
        self.slots = ctypes.create_string_buffer(8 * self.count)
        self.write = struct.Struct("=" + "".join(SLOTS[parameter.type] for parameter in entry.parameters)).pack_into
        start = ctypes.addressof(self.slots)
        self.array = (ctypes.c_void_p * self.count)(*range(start, start + 8 * self.count, 8))
        self.address = ctypes.addressof(self.array)

    def pack(self, arguments: tuple[Any, ...]) -> int:
        """Write the arguments into their slots; the index of the device they are on."""
        if len(arguments) != self.count:
            raise self._error(f"got {len(arguments)} arguments, but takes {self.count}: {', '.join(self.names)}.")
        values, index, i = list(arguments), None, 0
        try:
            for i, low_bits in self.pointers:
                tensor = values[i]
                if tensor is None:
                    values[i] = 0
                    continue
                device, values[i] = tensor.get_device(), (address := tensor.data_ptr())
                if device != index:
                    if index is not None or device < 0:
                        where = "a CUDA device" if index is None else f"cuda:{index}, where the tensors before it are"
                        raise self._error(f"{self.names[i]} is on {tensor.device}, but must be on {where}.")
                    index = device
                if address & low_bits:
                    rule = f"must be aligned to {low_bits + 1} bytes. Clone it."
                    raise self._error(f"{self.names[i]} is at address {address:#x}, but {rule}")
            self.write(self.slots, 0, *values)
        except AttributeError:
            raise self._error(f"{self.names[i]} is {arguments[i]!r}, but must be a tensor or None.") from None
        except (OverflowError, struct.error) as error:
            types = ", ".join(f"{p.name} {p.type}" for p in self.entry.parameters if p.type != "pointer")
            raise self._error(f"got {self.numbers(arguments)}, but takes {types}: {error}.") from None
        if index is None:
            raise self._error("got no tensor, but is launched where its tensors are. Pass one.")
        return index

    def numbers(self, arguments: tuple[Any, ...]) -> str:
        """The arguments that are no tensors, with their names."""
        pairs = zip(self.entry.parameters, arguments, strict=True)
        return ", ".join(f"{parameter.name}={value}" for parameter, value in pairs if parameter.type != "pointer")

    def _sizes(self, *values: int) -> tuple[int, int, int, int]:
        named = {self.names[i]: value for i, value in zip(self.sized, values, strict=True)}
        grid = self.entry.grid(named)
        if min(values, default=0) < 0 or any(size > most for size, most in zip(grid, GRID_LIMITS, strict=True)):
            raise self._error(f"{named} make a grid of {grid}, but CUDA takes 0 to {GRID_LIMITS}.")
        return *grid, self.entry.shared_bytes(named)

    def _error(self, fact: str) -> ValueError:
        return ValueError(f"{self.entry.name}: {fact}")


class _Here(threading.local):
    """The calls of one thread: in shared slots, two threads would mix their arguments."""

    def __init__(self) -> None:
        self.calls: dict[str, _Call] = {}

    def add(self, name: str) -> _Call:
        if name not in entries():
            raise ValueError(f"{name}: is not in the manifest, which has {', '.join(entries())}.")
        return self.calls.setdefault(name, _Call(entries()[name]))


# By process and device, since a handle means nothing after a fork: the driver's binding, the device's primary context
# (which is torch's, too), and each function with its limit of dynamic shared memory.
_loaded: dict[tuple[int, int], tuple[Any, Any, dict[str, tuple[Any, int]]]] = {}
# Never unloaded, because a captured graph may still hold them; kept apart, so that a second try compiles only the rest.
_modules: dict[tuple[int, int, str], Any] = {}
_started: int | None = None  # the process that initialised the driver
_lock = threading.Lock()
_here = _Here()


@functools.cache
def _reason(process: int, device: torch.device) -> str | None:
    try:
        _examine(device)
    # ImportError and SystemError are a broken binding's, RuntimeError that of a driver that lacks a function.
    except (ImportError, RuntimeError, SystemError, ValueError) as error:
        return f"{device}: {error}".removesuffix(".")
    return None


@functools.cache
def _limit(process: int, device: torch.device) -> int:
    if reason := refusal(device):
        raise RuntimeError(reason)
    return _attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", device.index)


def _examine(device: torch.device) -> None:
    """Raises ValueError with the reason, if the kernels do not run on that device."""
    global _started
    must(device.type == "cuda", "is no CUDA device, but the kernels are PTX for NVIDIA GPUs; move the model to one")
    must(_started in (None, os.getpid()), FORKED)  # first of all: the fork may have copied locks that are held
    # The library is asked before the binding is: a binding that fails to load its driver can leave its own lock held
    # (the first failure of cuda.core does so), and every later call of it would wait for ever.
    version = ctypes.c_int()
    try:
        ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except (AttributeError, OSError) as error:
        raise ValueError(f"no NVIDIA driver was found ({error}), but a GPU needs one; install it") from error
    _check_driver(version.value, "cuda.bindings", BINDING_DRIVER)
    must(_torch_has_cuda(), f"torch {torch.__version__} is built without CUDA, but allocates; install a build with it")

    from cuda.bindings import driver

    _started = os.getpid()
    (failure,) = driver.cuInit(0)
    if failure:
        _started = None
        must(failure != driver.CUresult.CUDA_ERROR_NOT_INITIALIZED, FORKED)  # after torch's own use of CUDA
        raise ValueError(f"cuInit failed with {_describe(failure)}, but must find a GPU; compare nvidia-smi")
    index, count = device.index, _check(driver.cuDeviceGetCount(), "cuDeviceGetCount")
    must(index < count, f"only {count} GPUs are visible, counted from 0; compare nvidia-smi and CUDA_VISIBLE_DEVICES")
    for text in _suitable(index).values():
        _check_driver(version.value, text.file, text.driver)
        read_text(FOLDER / text.file, text.sha256)


def _check_driver(version: int, name: str, least: int) -> None:
    got, needed = (f"{number // 1000}.{number % 1000 // 10}" for number in (version, least))
    must(version >= least, f"its driver takes CUDA up to {got}, but {name} needs {needed}; install a newer driver")


def _suitable(index: int) -> dict[str, Text]:
    """For each kernel the first of its texts that suits the device; those that only some kinds have may have none."""
    capability = _capability(index)
    chosen = {}
    for kernel, texts in read_manifest(FOLDER)[0].items():
        suiting = [text for text in texts if text.lowest <= capability <= text.highest]
        if suiting:
            chosen[kernel] = suiting[0]
            continue
        of_some = max(text.highest for text in texts) < NEWEST
        must(of_some, f"{_lack(index, kernel)}; run the layers dense")
    return chosen


def _lack(index: int, kernel: str) -> str:
    """Why a kernel has no text for a device."""
    ranges = (text.lowest + text.highest for text in read_manifest(FOLDER)[0][kernel])
    taken = ", ".join("{}.{} to {}.{}".format(*pair) for pair in ranges)
    return "its compute capability is {}.{}, but {} takes {}".format(*_capability(index), kernel, taken)


def _capability(index: int) -> tuple[int, int]:
    return _attribute("COMPUTE_CAPABILITY_MAJOR", index), _attribute("COMPUTE_CAPABILITY_MINOR", index)


def _load(index: int) -> tuple[Any, Any, dict[str, tuple[Any, int]]]:
    from cuda.bindings import driver

    texts, functions = _suitable(index), {}
    limit, where = shared_limit(torch.device("cuda", index)), f"loading the kernels on cuda:{index}"
    context = _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(index), where)), where)
    _check(driver.cuCtxPushCurrent(context), where)
    try:
        for name, entry in entries().items():
            text = texts.get(entry.kernel)
            if text is None:
                continue
            key = (os.getpid(), index, text.file)
            if key not in _modules:
                _modules[key] = _load_text(driver, text)
            functions[name] = _load_function(driver, _modules[key], name, limit)
    finally:
        driver.cuCtxPopCurrent()
    return driver, context, functions


def _load_text(driver: Any, text: Text) -> Any:
    image, log = read_text(FOLDER / text.file, text.sha256) + b"\0", bytearray(LOG_BYTES)
    options = [driver.CUjit_option.CU_JIT_ERROR_LOG_BUFFER, driver.CUjit_option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
    error, module = driver.cuModuleLoadDataEx(image, len(options), options, [log, len(log)])
    if error:
        said = log.partition(b"\0")[0].decode(errors="replace").strip() or "it left no log"
        raise RuntimeError(f"{text.file}: the driver failed to compile it with {_describe(error)}: {said}")
    return module


def _load_function(driver: Any, module: Any, name: str, limit: int) -> tuple[Any, int]:
    """The function, and its limit of dynamic shared memory: all that its static one leaves."""
    attributes = driver.CUfunction_attribute
    function = _check(driver.cuModuleGetFunction(module, name.encode()), f"{name}: finding it in its text")
    static = _check(driver.cuFuncGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function), name)
    attribute = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, limit - static), f"{name}: raising its shared memory")
    # A load put off would fall into a capture. Drivers before 12.4 lack this call; there, reading attributes loads.
    loaded: tuple[Any, ...] = (0,)
    with contextlib.suppress(RuntimeError):
        loaded = driver.cuFuncLoad(function)
    _check(loaded, f"{name}: loading it")
    return function, limit - static


def _attribute(name: str, index: int) -> int:
    from cuda.bindings import driver

    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return _check(driver.cuDeviceGetAttribute(attribute, _check(driver.cuDeviceGet(index), name)), name)


def _check(result: tuple[Any, ...], what: str) -> Any:
    """The value of a driver call; its failure is a RuntimeError."""
    error, *values = result
    if error:
        raise RuntimeError(f"{what} failed with {_describe(error)}.")
    return values[0] if values else None


def _describe(error: Any) -> str:
    from cuda.bindings import driver

    (_, name), (_, words) = driver.cuGetErrorName(error), driver.cuGetErrorString(error)
    return f"{name.decode()} ({words.decode()})" if name and words else str(error)


def _indexed(device: torch.device) -> torch.device:
    if device.index is not None or device.type != "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def _torch_has_cuda() -> bool:  # tests, whose torch has none, replace this function and the next two
    return torch.version.cuda is not None


def _current_stream(index: int) -> int:
    # What Inductor's own code calls: torch.cuda.current_stream makes a Stream object first, for a microsecond.
    return torch._C._cuda_getCurrentRawStream(index)


def _is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
