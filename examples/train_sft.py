"""Teach a packed model answers with trl's SFTTrainer: LoRA beside two-bit weights, packed rows.

    python examples/train_sft.py --output runs/sft

Needs trl and peft. Any packed BitNet checkpoint will do in place of the embedded one.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import bitnet_triton as bt
from bitnet_triton.training import PackingCollator, SafeCheckpoints

# a prompt ends where a token does: a line end and the indent behind it are one token here
PAIRS = [("def area(width, height):", "\n    return width * height\n"),
         ("def half(x):", "\n    return x / 2\n")]  # fmt: skip


def main(output: str, steps: int = 30) -> dict[str, str]:
    """Train on completions alone; return what the model then writes behind each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL, attention="full")
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in PAIRS])
    arguments = SFTConfig(
        output_dir=output, max_steps=steps, learning_rate=5e-3, per_device_train_batch_size=2,
        logging_steps=10, save_steps=steps, report_to="none", disable_tqdm=True, bf16=False,
        gradient_checkpointing=False, completion_only_loss=True,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer,
        peft_config=lora, data_collator=PackingCollator(), callbacks=[SafeCheckpoints()],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(output)  # the adapter alone

    base = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    adapted, written = PeftModel.from_pretrained(base, output).eval(), {}
    for prompt, _ in PAIRS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            tokens = adapted.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
        written[prompt] = tokenizer.decode(tokens[0, ids.shape[1] :])
        print(repr(prompt), "->", repr(written[prompt]))
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=tempfile.gettempdir() + "/sft")
    main(parser.parse_args().output)
