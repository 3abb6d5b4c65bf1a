"""What vendors publish about their devices, and how a compiler is told."""

from dataclasses import dataclass

GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
      kind: the name that the driver gives it.
      memory: bytes that a CUDA program sees.
      bandwidth: of the memory, in bytes a second.
      bfloat16: peak of dense matrix products with float32 sums, in FLOP/s.
      float32: the same for float32 arrays at JAX's default precision, which is TF32.
      capability: compute capability.
      cores: multiprocessors.
      clock: boost, in GHz.
      l2: bytes of cache.
      shared: bytes of shared memory a multiprocessor; a block can have 1 KiB less.
      threads: most threads a multiprocessor.
      lanes: float32 units a multiprocessor.
      source: of the facts.
    """

    kind: str
    memory: int
    bandwidth: float
    bfloat16: float
    float32: float
    capability: tuple[int, int]
    cores: int
    clock: float
    l2: int
    shared: int
    threads: int
    lanes: int
    source: str

    @property
    def description(self) -> str:
        """The text `GpuTargetConfigProto` from which XLA compiles for the device."""
        major, minor = self.capability
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * KIB,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - KIB,
            "threads_per_core_limit": self.threads,
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
        capability = f"major: {major}" + (f" minor: {minor}" if minor else "")
        return (
            f"gpu_device_info {{\n{lines}\n  cuda_compute_capability {{ {capability} }}\n}}\n"
            'platform_name: "CUDA"\ndnn_version_info { major: 9 minor: 12 }\nruntime_version { major: 13 }\n'
            f'device_description_str: "{self.kind}"\n'
        )


def _hopper(kind: str, memory: int, bandwidth: float, source: str) -> Gpu:
    return Gpu(kind, memory, bandwidth, 989.4e12, 494.7e12, (9, 0), 132, 1.98, 50 * MIB, 228 * KIB, 2048, 128, source)


def _ampere(kind: str, memory: int, bandwidth: float) -> Gpu:
    source = "NVIDIA A100 data sheet and GA100 whitepaper"
    return Gpu(kind, memory, bandwidth, 312e12, 156e12, (8, 0), 108, 1.41, 40 * MIB, 164 * KIB, 2048, 64, source)


GPUS = {
    "h100": _hopper("NVIDIA H100 80GB HBM3", 84929347584, 3.352e12, "NVIDIA H100 (SXM5) data sheet"),
    "h200": _hopper("NVIDIA H200", 151397597184, 4.8e12, "NVIDIA H200 (SXM) data sheet"),
    "a100-40g": _ampere("NVIDIA A100-SXM4-40GB", 42405855232, 1.555e12),
    "a100-80g": _ampere("NVIDIA A100-SXM4-80GB", 84987740160, 2.039e12),
    "b200": Gpu(
        "NVIDIA B200", 180 * 10**9, 8e12, 2.25e15, 1.1e15, (10, 0), 148, 1.965, 126 * MIB, 228 * KIB, 2048, 128,
        "NVIDIA DGX B200 data sheet, a GPU's eighth",
    ),
    "l4": Gpu(
        "NVIDIA L4", 22 * GIB, 300e9, 121e12, 60e12, (8, 9), 58, 2.04, 48 * MIB, 100 * KIB, 1536, 128,
        "NVIDIA L4 data sheet and Ada whitepaper",
    ),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", 25 * 10**9, 1.008e12, 165.2e12, 82.6e12, (8, 9), 128, 2.52, 72 * MIB, 100 * KIB,
        1536, 128, "NVIDIA Ada whitepaper",
    ),
}  # fmt: skip
"""GPUs by the name that a user gives; the figures are for dense products, without sparsity."""


@dataclass(frozen=True)
class Tpu:
    """A TPU chip.

    Attributes:
      memory: bytes a chip.
      bandwidth: of the memory, in bytes a second and chip.
      bfloat16: peak FLOP/s a chip; float32 arrays go through the same units at JAX's default precision.
      axes: 2 or 3, of the chips' grid.
      cores: devices that JAX sees a chip.
      config: libtpu's name for how a chip's cores are joined; empty for its default.
    """

    memory: int
    bandwidth: float
    bfloat16: float
    axes: int
    cores: int = 1
    config: str = ""
    source: str = "Google Cloud TPU documentation, system architecture pages"


TPUS = {
    "v4": Tpu(32 * GIB, 1.228e12, 275e12, 3, config="megacore"),
    "v5e": Tpu(16 * GIB, 819e9, 197e12, 2),
    "v5p": Tpu(95 * GIB, 2.765e12, 459e12, 3),
    "v6e": Tpu(32 * GIB, 1.64e12, 918e12, 2),
    "tpu7x": Tpu(192 * GIB, 7.38e12, 2307e12, 3, cores=2),
}
"""TPUs by the name that libtpu gives them."""
