"""What the tokenizer counts, for the monitor."""

from libllm.metrics import Instruments
from llmproto.metrics import Metrics


class Measures:
    """Requests, tokens and bytes, and how long the first text took."""

    def __init__(self) -> None:
        made = Instruments()
        self._instruments = made
        self.requests = made.counter("llmos_tokenizer_requests_total")
        self.refused = made.counter("llmos_tokenizer_refused_total")
        self.prompt_tokens = made.counter("llmos_tokenizer_prompt_tokens_total")
        self.output_tokens = made.counter("llmos_tokenizer_output_tokens_total")
        self.output_bytes = made.counter("llmos_tokenizer_output_bytes_total")
        self.first_text = made.histogram("llmos_tokenizer_first_text_seconds")
        self._streams = made.gauge("llmos_tokenizer_streams")

    def report(self, process: str, incarnation: int, *, streams: int) -> Metrics:
        """All of it, with the level of this moment."""
        self._streams.value = streams
        return self._instruments.report(process, incarnation)
