"""Use Tandem through the public `openai` package.

pip install openai
python examples/openai_client.py [http://HOST:PORT/v1]
"""

import sys

from openai import OpenAI


def main(base_url: str = "http://127.0.0.1:8000/v1") -> None:
    with OpenAI(base_url=base_url, api_key="none needed") as client:
        model = client.models.list().data[0].id
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Write a function that reads a JSON file."}],
            max_completion_tokens=64,
            temperature=0.0,
        )
        print(answer.choices[0].message.content)
        print("---")
        stream = client.completions.create(
            model=model, prompt="def read_json(path):", max_tokens=64, temperature=0.0, stream=True
        )
        for chunk in stream:
            print(chunk.choices[0].text if chunk.choices else "", end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
