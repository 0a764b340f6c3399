"""Words in, words out: tokens, chat templates, tool calls and grammars. Runs without torch."""
