// Numbers for people. A missing value is a dash.

const DASH = "–";

export function seconds(value) {
  if (value == null) return DASH;
  if (value > 0 && value < 0.00095) return `${Number((value * 1e3).toPrecision(2))} ms`;
  if (value < 0.0995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 0.9995) return `${(value * 1e3).toFixed(0)} ms`;
  return value < 99.5 ? `${value.toPrecision(3)} s` : duration(value);
}

export function duration(value) {
  const whole = Math.round(value);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  const hours = Math.floor(whole / 3600);
  return hours < 48 ? `${hours} h ${Math.floor((whole % 3600) / 60)} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export const rate = (value) => (value == null ? DASH : `${value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0)}/s`);

export const percent = (share) => (share == null || Number.isNaN(share) ? DASH : `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`);

export const count = (value) => value.toLocaleString("en").replaceAll(",", " ");

export const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit && value < 100 ? value.toFixed(1) : value.toFixed(0)} ${units[unit]}`;
}
