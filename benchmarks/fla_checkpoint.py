"""A model of flash-linear-attention with random weights: its folder, its logits, and its time.

    python -m benchmarks.fla_checkpoint FOLDER '{"model_type": "gated_deltanet", ...}' ROWS TIME

`benchmarks.large_checkpoints` starts it, in a process of its own. FOLDER gets config.json,
model.safetensors in bfloat16, and expected.safetensors as `mbd convert --check` takes it;
milliseconds of a forward pass go to standard output as JSON.
"""

import json
import sys
import time
from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]
from fla.models import (  # pyright: ignore[reportMissingImports]
    DeltaNetConfig,
    DeltaNetForCausalLM,
    GatedDeltaNetConfig,
    GatedDeltaNetForCausalLM,
)
from safetensors.torch import save_file

KINDS = {
    "delta_net": (DeltaNetConfig, DeltaNetForCausalLM),
    "gated_deltanet": (GatedDeltaNetConfig, GatedDeltaNetForCausalLM),
}


def main(folder: Path, settings: dict, rows: int, length: int) -> None:
    torch.manual_seed(0)
    configuration, model_class = KINDS[settings.pop("model_type")]
    model = model_class(configuration(**settings)).to("cuda", torch.bfloat16).eval()
    model.save_pretrained(folder)
    tokens = torch.randint(model.config.vocab_size, (rows, length), device="cuda")
    times = []
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model(tokens, use_cache=False)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    held = {"input_ids": tokens.cpu(), "logits": logits.float().cpu()}
    save_file(held, folder / "expected.safetensors")
    print(json.dumps({"ms": sorted(times)[2]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
