// The colors of sam3_jax/outputs/colors.py: hues a golden angle apart in OKLCH (Björn Ottosson
// 2020), where equal distances look equal. Neighbors differ in hue and in lightness, which people
// with any kind of color vision can tell apart.

const colors = new Map();

/** The color [red, green, blue], each 0..255, of an index. */
export function color(index) {
  if (!colors.has(index)) {
    const hue = 2 * Math.PI * ((0.69 + (index * (Math.sqrt(5) - 1)) / 2) % 1);
    let [vivid, most] = [0, -1];
    for (let step = 0; step < 23; step++) {
      const lightness = 0.62 + step * 0.01;
      const chroma = largestChroma(lightness, hue);
      if (chroma > most) [vivid, most] = [lightness, chroma];
    }
    const lightness = vivid + [0, 0.05, -0.05][index % 3];
    const linear = oklch(lightness, largestChroma(lightness, hue), hue);
    colors.set(index, linear.map((value) => Math.round(255 * gamma(value))));
  }
  return colors.get(index);
}

/** The color as CSS, with an opacity. */
export const css = ([r, g, b], alpha = 1) => `rgb(${r} ${g} ${b} / ${alpha})`;

/** Black or white, whichever is more readable on a color (WCAG's relative luminance). */
export function ink(rgb) {
  const [r, g, b] = rgb.map((value) => ((value / 255 + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

/** The largest chroma, up to 0.2, within sRGB. */
function largestChroma(lightness, hue) {
  for (let step = 0; step < 40; step++) {
    const chroma = 0.2 - step * 0.005;
    if (oklch(lightness, chroma, hue).every((value) => value >= 0 && value <= 1)) return chroma;
  }
  return 0;
}

/** Converts OKLCH to linear sRGB. */
function oklch(lightness, chroma, hue) {
  const [a, b] = [chroma * Math.cos(hue), chroma * Math.sin(hue)];
  const long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const short = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
    -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
    -0.0041960863 * long - 0.7034186147 * medium + 1.707614701 * short,
  ];
}

const gamma = (linear) => (linear <= 0.0031308 ? 12.92 * linear : 1.055 * linear ** (1 / 2.4) - 0.055);
