// The parts of a request's time, in order (core/timeline.py).

export const PARTS = [
  ["admission_s", "admission", "idle"],
  ["dispatch_s", "dispatch", "sky"],
  ["prefill_queue_s", "prefill queue", "amber"],
  ["prefill_s", "prefill", "prefill"],
  ["transfer_s", "transfer", "mixed"],
  ["decode_queue_s", "decode queue", "soft"],
  ["second_token_s", "second token", "colocated"],
  ["decode_s", "decode", "decode"],
];
export const BEFORE_FIRST_TOKEN = 4;

export const partsOf = (values, parts = PARTS) =>
  parts.filter(([field]) => values[field] != null).map(([field, name, colour]) => ({ name, colour, value: values[field] }));

export const sum = (parts) => parts.reduce((total, part) => total + part.value, 0);
