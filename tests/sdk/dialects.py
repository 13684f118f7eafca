"""The answers of each API, as JSON and as events of a stream, as the documentation of the providers describes them."""

import json


def dialect_of(path, body):
    """The dialect of a request, by its path."""
    if path.endswith("/chat/completions"):
        return Chat(path, body)
    if path.endswith("/responses"):
        return Responses(path, body)
    if path.endswith("/messages"):
        return Messages(path, body)
    return Gemini(path, body)


def pieces(text):
    """Splits a text like a model does: pieces may end within words and escapes."""
    return [text[i : i + 7] for i in range(0, len(text), 7)]


def named_event(event):
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"


class Dialect:
    key_header = "authorization"

    def __init__(self, path, body):
        self.path, self.body = path, body
        self.model = body.get("model", "gemini-2.5-flash")
        self.is_streaming = body.get("stream") is True

    @staticmethod
    def key_value(key):
        return f"Bearer {key}"

    def has_tools(self):
        return bool(self.body.get("tools"))


class Chat(Dialect):
    """OpenAI's chat completions."""

    def results(self):
        return [message["content"] for message in self.body["messages"] if message["role"] == "tool"]

    @staticmethod
    def usage(usage):
        prompt, completion = usage
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self, text, calls, usage):
        message = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = [self.call_head(i, name, json.dumps(a)) for i, (name, a) in enumerate(calls)]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": self.model}
        return head | {"choices": [choice], "usage": self.usage(usage)}

    @staticmethod
    def call_head(index, name, arguments):
        return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}

    def event(self, choices, usage=None):
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": self.model}
        return f"data: {json.dumps(head | {'choices': choices, 'usage': usage})}\n\n"

    def delta(self, delta, finish_reason=None):
        return self.event([{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def begin(self, _):
        self.finish_reason = "stop"
        return [self.delta({"role": "assistant", "content": ""})]

    def word(self, word):
        return [self.delta({"content": word})]

    def call(self, index, name, arguments):
        self.finish_reason = "tool_calls"
        parts = [{"index": index, "function": {"arguments": piece}} for piece in pieces(arguments)]
        head = {"index": index} | self.call_head(index, name, "")
        return [self.delta({"tool_calls": [part]}) for part in [head, *parts]]

    def end(self, usage):
        events = [self.delta({}, self.finish_reason)]
        if (self.body.get("stream_options") or {}).get("include_usage"):
            events.append(self.event([], self.usage(usage)))
        return [*events, "data: [DONE]\n\n"]


class Responses(Dialect):
    """OpenAI's Responses."""

    def results(self):
        items = self.body["input"] if isinstance(self.body["input"], list) else []
        return [item["output"] for item in items if item.get("type") == "function_call_output"]

    def response(self, output, usage):
        response = {
            "id": "resp_1",
            "object": "response",
            "created_at": 1,
            "status": "completed" if usage else "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": self.body.get("tools", []),
            "top_p": 1.0,
            "usage": None,
        }
        if usage:
            prompt, completion = usage
            details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
            counts = {"input_tokens": prompt, "output_tokens": completion, "total_tokens": prompt + completion}
            response["usage"] = counts | details
        return response

    @staticmethod
    def message(text, status="completed"):
        content = [{"type": "output_text", "text": text, "annotations": []}] if text else []
        return {"type": "message", "id": "msg_1", "status": status, "role": "assistant", "content": content}

    @staticmethod
    def function_call(index, name, arguments, status="completed"):
        item = {"type": "function_call", "id": f"fc_{index}", "call_id": f"call_{index}"}
        return item | {"name": name, "arguments": arguments, "status": status}

    def whole(self, text, calls, usage):
        output = [self.message(text)] if text else []
        output += [self.function_call(i, name, json.dumps(a)) for i, (name, a) in enumerate(calls)]
        return self.response(output, usage)

    def event(self, kind, **fields):
        self.number += 1
        return named_event({"type": kind, "sequence_number": self.number} | fields)

    def begin(self, _):
        self.number, self.text, self.output = -1, "", []
        response = self.response([], None)
        return [self.event("response.created", response=response), self.event("response.in_progress", response=response)]

    def word(self, word):
        where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        events = []
        if not self.text:
            part = {"type": "output_text", "text": "", "annotations": []}
            item = self.message("", "in_progress")
            events.append(self.event("response.output_item.added", output_index=0, item=item))
            events.append(self.event("response.content_part.added", part=part, **where))
        self.text += word
        return [*events, self.event("response.output_text.delta", delta=word, logprobs=[], **where)]

    def call(self, index, name, arguments):
        where = {"item_id": f"fc_{index}", "output_index": index}
        begun, done = self.function_call(index, name, "", "in_progress"), self.function_call(index, name, arguments)
        self.output.append(done)
        delta, end = "response.function_call_arguments.delta", "response.function_call_arguments.done"
        return [
            self.event("response.output_item.added", output_index=index, item=begun),
            *[self.event(delta, delta=piece, **where) for piece in pieces(arguments)],
            self.event(end, arguments=arguments, name=name, **where),
            self.event("response.output_item.done", output_index=index, item=done),
        ]

    def end(self, usage):
        events = []
        if self.text:
            where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
            message = self.message(self.text)
            self.output.insert(0, message)
            events = [
                self.event("response.output_text.done", text=self.text, logprobs=[], **where),
                self.event("response.content_part.done", part=message["content"][0], **where),
                self.event("response.output_item.done", output_index=0, item=message),
            ]
        return [*events, self.event("response.completed", response=self.response(self.output, usage))]


class Messages(Dialect):
    """Anthropic's Messages."""

    key_header = "x-api-key"

    @staticmethod
    def key_value(key):
        return key

    def results(self):
        blocks = [block for m in self.body["messages"] if isinstance(m["content"], list) for block in m["content"]]
        return [block["content"] for block in blocks if block["type"] == "tool_result"]

    def message(self, content, stop_reason, usage):
        head = {"id": "msg_1", "type": "message", "role": "assistant", "model": self.model, "stop_sequence": None}
        counts = {"input_tokens": usage[0], "output_tokens": usage[1]}
        caches = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        return head | {"content": content, "stop_reason": stop_reason, "usage": counts | caches}

    def whole(self, text, calls, usage):
        content = [{"type": "text", "text": text}] if text else []
        content += [
            {"type": "tool_use", "id": f"toolu_{i}", "name": name, "input": arguments}
            for i, (name, arguments) in enumerate(calls)
        ]
        return self.message(content, "tool_use" if calls else "end_turn", usage)

    def begin(self, usage):
        self.stop_reason, self.is_open = "end_turn", False
        start = {"type": "message_start", "message": self.message([], None, (usage[0], 1))}
        return [named_event(start), named_event({"type": "ping"})]

    @staticmethod
    def block(index, kind, **fields):
        return named_event({"type": f"content_block_{kind}", "index": index} | fields)

    def word(self, word):
        events = [] if self.is_open else [self.block(0, "start", content_block={"type": "text", "text": ""})]
        self.is_open = True
        return [*events, self.block(0, "delta", delta={"type": "text_delta", "text": word})]

    def call(self, index, name, arguments):
        self.stop_reason = "tool_use"
        block = {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in ["", *pieces(arguments)]]
        return [
            self.block(index, "start", content_block=block),
            *[self.block(index, "delta", delta=delta) for delta in deltas],
            self.block(index, "stop"),
        ]

    def end(self, usage):
        delta = {"stop_reason": self.stop_reason, "stop_sequence": None}
        end = {"type": "message_delta", "delta": delta, "usage": {"output_tokens": usage[1]}}
        closing = [self.block(0, "stop")] if self.is_open else []
        return [*closing, named_event(end), named_event({"type": "message_stop"})]


class Gemini(Dialect):
    """Google's generateContent and streamGenerateContent."""

    key_header = "x-goog-api-key"

    def __init__(self, path, body):
        super().__init__(path, body)
        self.is_streaming = ":streamGenerateContent" in path

    @staticmethod
    def key_value(key):
        return key

    def results(self):
        parts = [part for content in self.body["contents"] for part in content["parts"]]
        return [part["functionResponse"]["response"]["result"] for part in parts if "functionResponse" in part]

    def chunk(self, parts, usage, finish_reason=None):
        candidate = {"content": {"role": "model", "parts": parts}, "index": 0}
        if finish_reason:
            candidate["finishReason"] = finish_reason
        prompt, completion = usage
        counts = {"promptTokenCount": prompt, "totalTokenCount": prompt + completion}
        if completion:
            counts["candidatesTokenCount"] = completion
        return {"candidates": [candidate], "usageMetadata": counts, "modelVersion": self.model, "responseId": "r1"}

    def whole(self, text, calls, usage):
        parts = [{"text": text}] if text else []
        parts += [{"functionCall": {"name": name, "args": arguments}} for name, arguments in calls]
        return self.chunk(parts, usage, "STOP")

    @staticmethod
    def event(chunk):
        return f"data: {json.dumps(chunk)}\r\n\r\n"

    def begin(self, usage):
        self.prompt, self.words = usage[0], 0
        return []

    def word(self, word):
        self.words += 1
        return [self.event(self.chunk([{"text": word}], (self.prompt, self.words)))]

    def call(self, _, name, arguments):
        call = {"functionCall": {"name": name, "args": json.loads(arguments)}}
        return [self.event(self.chunk([call], (self.prompt, 0)))]

    def end(self, usage):
        return [self.event(self.chunk([{"text": ""}], usage, "STOP"))]
