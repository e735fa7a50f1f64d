"""Requests that arrive together share a call, and nothing else."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from helpers.server import TEXTS, make_model, running

from hf_xmc.serving.batching import Batcher, Overloaded


def submit_all(batcher, submitted):
    """Submit requests at the same time, and return the answer or the error of each."""

    async def run():
        answering = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*(batcher.submit(*one) for one in submitted), return_exceptions=True)
        answering.cancel()
        return answers

    return asyncio.run(run())


def recorder(calls):
    def answer(texts, options):
        calls.append((texts, options))
        if "wrong" in texts:
            raise ValueError("a wrong text")
        return [f"{text} {options}" for text in texts]

    return answer


def test_requests_with_equal_options_share_a_call():
    calls = []
    answers = submit_all(Batcher(recorder(calls), 8, 0.01, 9), [(["a", "b"], 1), (["c"], 2), ([], 1), (["d"], 1)])
    assert answers == [["a 1", "b 1"], ["c 2"], [], ["d 1"]]
    assert calls == [(["a", "b", "d"], 1), (["c"], 2)]


def test_a_full_batch_takes_no_more_requests():
    calls = []
    submit_all(Batcher(recorder(calls), 2, 0.01, 9), [(["a"], 1), (["b", "c"], 1), (["d"], 1)])
    assert [texts for texts, _ in calls] == [["a", "b", "c"], ["d"]]


def test_an_error_reaches_only_the_request_at_fault():
    calls = []
    answers = submit_all(Batcher(recorder(calls), 8, 0.01, 9), [(["a"], 1), (["b", "wrong"], 1), (["c"], 1)])
    assert [answers[0], answers[2]] == [["a 1"], ["c 1"]]
    assert str(answers[1]) == "a wrong text"


def test_a_full_queue_refuses_further_requests():
    answers = submit_all(Batcher(recorder([]), 8, 0.01, 2), [(["a"], 1), (["b"], 1), (["c"], 1)])
    assert answers[:2] == [["a 1"], ["b 1"]]
    assert isinstance(answers[2], Overloaded)
    assert "2 requests wait" in str(answers[2])


@pytest.mark.parametrize("wait", [0.0, 20.0])
def test_requests_of_64_clients_are_answered_as_alone_in_fewer_calls(wait):
    model, calls, threads = make_model(), [], set()
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 5)][:64]
    alone = [model.predict(text) for text in texts]
    predict = model.predict

    def counted(texts, **options):
        calls.append(len(texts))
        threads.add(threading.current_thread().name)
        return predict(texts, **options)

    model.predict = counted
    together = threading.Barrier(64)
    with running(model, batch_wait_ms=wait) as url:

        def ask(text):
            together.wait()
            return requests.post(f"{url}/predict", json={"texts": text}, timeout=60).json()["predictions"][0]

        with ThreadPoolExecutor(64) as clients:
            answers = list(clients.map(ask, texts))
    for answer, labels in zip(answers, alone, strict=True):
        assert [label["uid"] for label in answer] == [label.uid for label in labels]
        scores = [label.score for label in labels]
        assert [label["score"] for label in answer] == pytest.approx(scores, rel=1e-5, abs=1e-6)  # float32 rounds
    assert sum(calls) == 64
    assert len(calls) < 40
    assert len(threads) == 1
