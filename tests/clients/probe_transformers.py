"""transformers from 4.55 on, and PEFT where a job has an adapter."""

import functools

import torch
import transformers
from protocol import ANSWER, Parts, answer


def read(job: dict) -> Parts:
    @functools.cache
    def tokenizer():
        return transformers.AutoTokenizer.from_pretrained(job["adapter"] or job["path"])

    @functools.cache
    def model():
        # Quantised weights have a type of their own.
        dtype = "auto" if job["quantised"] else torch.float32
        found = transformers.AutoModelForCausalLM.from_pretrained(job["path"], dtype=dtype)
        if job["adapter"]:
            from peft import PeftModel

            found = PeftModel.from_pretrained(found, job["adapter"])
        return found.eval()

    def logits(ids):
        with torch.no_grad():
            return model()(input_ids=torch.tensor([ids])).logits[0].float()

    def greedy(ids):
        prompt = torch.tensor([ids])
        options = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
        with torch.no_grad():
            return model().generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0][len(ids) :]

    return {
        "ids": lambda text: tokenizer()(text)["input_ids"],
        "prompt": lambda messages: tokenizer().apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        ),
        "logits": logits,
        "greedy": greedy,
    }


torch.set_num_threads(1)
answer(read)
