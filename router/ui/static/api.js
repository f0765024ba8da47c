// Reads JSON from the router, with the API key where it asks for one.

const KEY = "tandem-api-key";
const TIMEOUT_MS = 10_000;

export class KeyNeeded extends Error {}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

export function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

// Raises KeyNeeded where the key is missing or wrong, an Error with the router's sentence for any other failure.
export async function check(response) {
  if (response.ok) return response;
  if (response.status === 401) throw new KeyNeeded(await sentence(response));
  throw new Error(await sentence(response));
}

async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The router answered with status ${response.status}.`;
  }
}

export async function read(path) {
  const response = await fetch(path, { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  return (await check(response)).json();
}
