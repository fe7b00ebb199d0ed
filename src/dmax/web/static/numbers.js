/** Numbers as people read them. */

/** A share as people read it: 0.634 is "63 %". */
export function percent(share) {
  return `${Math.round(share * 100)} %`;
}

/** "1 forward", "7 forwards". */
export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** 1, 2 or 5 times a power of ten, and at least `least`. */
export function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least);
}
