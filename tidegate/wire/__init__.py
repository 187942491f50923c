"""What crosses a socket: OpenAI's shapes (`openai`) and the messages between our own services (`internal`). Pure."""
