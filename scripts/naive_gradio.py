"""The baseline of bench_serving.py: the chat most tutorials end with, Gradio's queue around `model.generate`.

python scripts/naive_gradio.py MODEL_DIRECTORY PORT MAX_NEW_TOKENS
"""

import sys
from collections.abc import Iterator
from threading import Thread


def main(directory: str, port: int, max_new_tokens: int) -> None:
    """Serve until the process is ended."""
    import gradio
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)

    def answer(message: str, _: object) -> Iterator[str]:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        Thread(target=model.generate, kwargs={**said, "streamer": pieces, "max_new_tokens": max_new_tokens}).start()
        text = ""
        for piece in pieces:
            text += piece
            yield text

    gradio.ChatInterface(answer, api_name="chat").queue().launch(server_name="127.0.0.1", server_port=port, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
