"""One page on this machine: what is here, which backends run, and why the others do not.

    python bench/doctor.py

Measures nothing. Exit code 0 when at least one backend runs, 1 when none does.
"""

import argparse
import contextlib
import sys

import torch
from flashstudy import backends
from flashstudy.backends import torch_sdpa
from flashstudy.bench import common
from tabulate import tabulate

SHAPE = (2, 8, 512, 64)  # B, H, N, D for which torch is asked what it would pick


def machine(device):
    """(name, value) lines on the hardware and the versions; what is absent says so."""
    about, state = common.environment(device), common.gpu_state(device)
    yield "device", about["device"]
    yield "memory", f"{about['memory_mib'] / 1024:.1f} GiB"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, _ = torch.cuda.mem_get_info(device)
        yield "free now", f"{free / 2**30:.1f} GiB"
        yield "compute capability", f"{properties.major}.{properties.minor}"
        yield "multiprocessors", properties.multi_processor_count
        yield "L2 cache", f"{getattr(properties, 'L2_cache_size', 0) / common.MIB:.0f} MiB"
        for name, key, unit in (
            ("clock now", "sm_mhz", "MHz"),
            ("memory clock now", "memory_mhz", "MHz"),
            ("power now", "power_w", "W"),
            ("power limit", "power_limit_w", "W"),
            ("temperature", "temperature_c", "°C"),
        ):
            yield name, f"{state[key]:g} {unit}" if key in state else "nvidia-smi does not say"
    else:
        yield "threads", about["threads"]
        yield "free now", f"{common.available_bytes() / 2**30:.1f} GiB"
        build = torch.version.cuda
        yield "CUDA GPU", "none" + ("" if build else "; this torch is built without CUDA")
    absent = "not installed"
    yield "driver", about["driver"] or "none"
    yield "Python", about["python"]
    yield "torch", about["torch"]
    yield "CUDA", about["cuda"] or "none"
    yield "cuDNN", about["cudnn"] or "none"
    yield "Triton", about["triton"] or absent
    yield "flash-attn 2", about["flash_attn"] or absent
    yield "flash-attn 4", about["flash_attn_4"] or absent
    yield "fp32 products", f"{about['float32_matmul']} precision"
    yield "flashstudy", f"commit {about['commit'] or 'unknown'}, sources {about['source']}"


def runs(device):
    """A line per backend: what runs per dtype, the backward, and the reasons against."""
    found = []
    for name, row in backends.BACKENDS.items():
        reasons = {
            dtype: backends.why_not(name, device, torch_dtype)
            for dtype, torch_dtype in common.DTYPES.items()
        }
        forward = " ".join(common.short(d) for d, reason in reasons.items() if reason is None)
        one = next((t for d, t in common.DTYPES.items() if reasons[d] is None), None)
        backward = one is not None and backends.why_not(name, device, one, backward=True) is None
        why = "; ".join(dict.fromkeys(r for r in reasons.values() if r is not None))
        found.append([name, row.label, forward or "no", "yes" if backward else "no", why])
    return found


def picks(device):
    """What torch's own SDPA would pick per dtype, in a forward and where gradients are wanted."""
    for dtype, torch_dtype in common.DTYPES.items():
        line = [common.short(dtype)]
        for grad in (False, True):
            for causal in (False, True):
                q, k, v = (
                    torch.empty(SHAPE, dtype=torch_dtype, device=device, requires_grad=grad)
                    for _ in range(3)
                )
                choice = "–"
                with contextlib.suppress(RuntimeError):  # no kernel takes this dtype here
                    choice = torch_sdpa.picked(q, k, v, causal=causal)
                line.append(choice)
        yield line


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", type=common.device_argument, default=None,
        help="cpu, cuda or cuda:INDEX (default: cuda where there is one)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    device = common.default_device() if args.device is None else args.device

    def table(rows, *header):
        print(tabulate(rows, header, tablefmt="simple", disable_numparse=True))

    table(list(machine(device)))
    print()
    lines = runs(device)
    table(lines, "backend", "label", "runs", "backward", "why not")
    b, h, n, d = SHAPE
    print(f"\nWhat torch's scaled_dot_product_attention picks, batch {b}, {h} heads, N {n}, D {d}")
    table(list(picks(device)), "dtype", "full", "causal", "full, gradients", "causal, gradients")
    able = sum(line[2] != "no" for line in lines)
    print(f"\n{able} of {len(lines)} backends run here.", end=" ")
    print("Next: python bench/seqlen.py" if able else "Install torch with CUDA, or a newer torch.")
    return 0 if able else 1


if __name__ == "__main__":
    sys.exit(main())
