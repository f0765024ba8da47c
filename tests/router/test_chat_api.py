"""/v1/chat/completions with plain HTTP."""

from tests.router.front import MODEL, Front

ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]}


async def test_answers_in_openais_shape(front: Front) -> None:
    front.say("hello there")
    async with front.client() as client:
        response = await client.post("/v1/chat/completions", json=ASK)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["choices"][0]["message"]["content"] == "hello there"
