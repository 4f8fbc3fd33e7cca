"""The gateway: the OpenAI API over HTTP, metrics, health, streams that can be resumed."""
