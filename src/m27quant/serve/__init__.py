"""The builtin server: OpenAI's HTTP interface over the runtime, for one machine."""
