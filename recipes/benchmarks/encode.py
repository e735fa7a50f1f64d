"""Measure the time to embed queries with `encode_query` of sentence-transformers, and with our `encode_queries`.

    python recipes/benchmarks/encode.py --model runs/demo/model --data recipes/data/wordnet-hypernyms --threads 1

The two functions take turns, and the medians are printed as JSON. They differ only for encoders with phrases.
"""

import argparse
import json
import time

import numpy as np

from hf_xmc.cli import HelpFormatter


def milliseconds(call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="saved model, for example from recipes/demo.py")
    parser.add_argument("--data", required=True, help="data set, whose test queries are embedded")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 1024], help="numbers of texts per call")
    parser.add_argument("--rounds", type=int, default=50, help="number of calls of each function")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of PyTorch")
    options = parser.parse_args()

    import torch

    from hf_xmc import XMCModel, load_xmc
    from hf_xmc.encoders.encode import encode_queries

    torch.set_num_threads(options.threads)
    encoder = XMCModel.from_pretrained(options.model, device="cpu").encoder
    queries = list(load_xmc(options.data).test["text"])
    for number in options.texts:
        times = np.empty((options.rounds, 2))
        for turn in range(options.rounds):
            texts = [queries[(turn * number + row) % len(queries)] for row in range(number)]
            times[turn, 0] = milliseconds(lambda texts=texts: encoder.encode_query(texts, batch_size=1024))
            times[turn, 1] = milliseconds(lambda texts=texts: encode_queries(encoder, texts, 1024))
        stock, ours = np.median(times, axis=0)
        print(json.dumps({"texts": number, "encode_query_ms": stock, "encode_queries_ms": ours, "ratio": stock / ours}))


if __name__ == "__main__":
    main()
