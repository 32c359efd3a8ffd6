"""llama.cpp's server, as the package xllamacpp runs it: what `llama-server -m FILE --lora ADAPTER` answers."""

import json
import urllib.request

import numpy as np
import xllamacpp.xllamacpp as llama
from protocol import ANSWER, Parts, answer

# A server that ends before its loop runs hangs (2026.10), so all of them live until the process ends.
servers = []


def read(job: dict) -> Parts:
    options = llama.CommonParams()
    options.model.path = job["path"]
    if job["adapter"]:
        options.lora_adapters = [llama.CommonAdapterLoraInfo(job["adapter"], 1.0)]
    options.n_ctx, options.n_parallel, options.verbosity = 512, 1, 1
    options.warmup = options.ui = options.fit_params = False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    # The default rounds keys and values to float16.
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    servers.append(llama.Server(options))
    address = servers[-1].listening_address

    def post(path, request):
        data, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(address + path, data, headers)) as reply:
            return json.load(reply)

    def complete(ids, count, probabilities=0):
        request = {"prompt": ids, "n_predict": count, "n_probs": probabilities, "temperature": 0, "return_tokens": True}
        return post("/completion", request | {"samplers": ["temperature"], "ignore_eos": True, "cache_prompt": False})

    def logits(ids):
        """The log-probabilities of the token after the last one, which is all that the server tells."""
        [last] = complete(ids, 1, job["vocabulary"])["completion_probabilities"]
        row = np.full(job["vocabulary"], -np.inf)
        for token in last["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        return row[None]

    def prompt(messages):
        return job["bos"] + post("/apply-template", {"messages": messages})["prompt"]

    return {
        "ids": lambda text: post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"],
        "prompt": prompt,
        "logits": logits,
        "greedy": lambda ids: complete(ids, ANSWER)["tokens"],
    }


answer(read)
