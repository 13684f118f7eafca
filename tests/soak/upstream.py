"""The upstream of the soak: a simulated chat API that keeps a record of every request. Usage: upstream.py PORT RECORD.

Each line of the record is `begun ID PROMPT COMPLETION` or `ended ID`. It is written before the first and after the last
byte of an answer, so it survives a kill of this process."""

import asyncio
import json
import random
import sys

PORT, RECORD = int(sys.argv[1]), open(sys.argv[2], "a", buffering=1)
PROMPT = 8


def record(*words):
    RECORD.write(" ".join(map(str, words)) + "\n")


def usage(completion):
    return {"prompt_tokens": PROMPT, "completion_tokens": completion, "total_tokens": PROMPT + completion}


def event(choices, usage=None):
    return b"data: " + json.dumps({"id": "c", "choices": choices, "usage": usage}).encode() + b"\n\n"


def delta(text):
    return event([{"index": 0, "delta": {"content": text}, "finish_reason": None}])


async def answer(writer, number, streams, completion):
    record("begun", number, PROMPT, completion)
    if not streams:
        message = {"role": "assistant", "content": "word " * completion}
        body = json.dumps({"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage(completion)}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    else:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        events = [delta("word ")] * completion
        events += [event([{"index": 0, "delta": {}, "finish_reason": "stop"}]), event([], usage(completion)), b"data: [DONE]\n\n"]
        for data in events:
            writer.write(b"%x\r\n" % len(data) + data + b"\r\n")
            await writer.drain()
            if random.random() < 0.2:
                await asyncio.sleep(random.random() * 0.02)
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    record("ended", number)


async def serve(reader, writer):
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
            body = json.loads(await reader.readexactly(int(fields["content-length"])))
            await asyncio.sleep(random.random() * 0.01)
            if random.random() < 0.03:
                refusal = b'{"error":{"message":"overloaded"}}'
                writer.write(b"HTTP/1.1 503 Overloaded\r\ncontent-length: %d\r\n\r\n" % len(refusal) + refusal)
            else:
                await answer(writer, fields["x-number"], body.get("stream", False), random.randint(1, body["max_tokens"]))
            if random.random() < 0.05:
                # Closes the connection without announcing it.
                await writer.drain()
                break
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", PORT, backlog=1024)
    await server.serve_forever()


asyncio.run(main())
