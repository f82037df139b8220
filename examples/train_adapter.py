"""Teach a packed model a text with LoRA: the base stays in two bits a weight, and unchanged.

    python examples/train_adapter.py --output runs/adapter

Needs peft. Any packed BitNet checkpoint will do in place of the embedded one.
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments

import bitnet_triton as bt

TEXT = "def area(width, height):\n    return width * height  # of a field of barley\n"


def main(output: str, steps: int = 20) -> PeftModel:
    """Train, save, load again beside a fresh base, and write with the adapter and without."""
    tokenizer = AutoTokenizer.from_pretrained(bt.TINY_MODEL)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[0]
    model = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.print_trainable_parameters()

    arguments = TrainingArguments(
        output_dir=output, max_steps=steps, learning_rate=5e-3, per_device_train_batch_size=1,
        logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids}]
    Trainer(model=model, args=arguments, train_dataset=data).train()
    model.save_pretrained(output)  # the adapter alone

    base = bt.BitNetForCausalLM.from_pretrained(bt.TINY_MODEL)
    model = PeftModel.from_pretrained(base, output).eval()
    prompt = ids[None, :6]

    def write() -> str:
        with torch.no_grad():
            tokens = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
        return tokenizer.decode(tokens[0])

    print("with the adapter:   ", repr(write()))
    with model.disable_adapter():
        print("without the adapter:", repr(write()))
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default=tempfile.gettempdir() + "/adapter")
    main(parser.parse_args().output)
