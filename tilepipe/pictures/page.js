"use strict";
(() => {
  const map = document.querySelector(".map");
  const layers = map.querySelector(".layers");
  const bar = map.querySelector(".scale");
  const opacity = document.querySelector("#opacity");
  const MOST = 64;
  let zoom = 1, left = 0, top = 0;

  // The largest of 1, 2 and 5 times a power of ten that is at most `most`.
  const round = (most) => {
    const power = 10 ** Math.floor(Math.log10(most));
    return [5, 2, 1].find((factor) => factor * power <= most * (1 + 1e-9)) * power;
  };
  const spelled = (length) => {
    if (bar.dataset.unit !== "m") return `${length} px`;
    const units = [["km", 1e3], ["m", 1], ["cm", 1e-2], ["mm", 1e-3]];
    const [unit, scale] = units.find((each) => length >= each[1] * (1 - 1e-9)) ?? units[1];
    return `${Number((length / scale).toPrecision(6))} ${unit}`;
  };

  const place = () => {
    const width = map.clientWidth, height = map.clientHeight;
    left = Math.min(0, Math.max(left, width * (1 - zoom)));
    top = Math.min(0, Math.max(top, height * (1 - zoom)));
    layers.style.transform = `translate(${left}px, ${top}px) scale(${zoom})`;
    layers.classList.toggle("near", width * zoom > Number(map.dataset.columns));
    map.classList.toggle("zoomed", zoom > 1);
    const across = Number(bar.dataset.across) / zoom;
    const least = bar.dataset.unit === "m" ? 0 : 1;
    const length = Math.max(round(0.3 * across), least);
    bar.style.setProperty("--share", length / across);
    bar.firstChild.data = spelled(length);
  };
  // Zooms by a factor about a point of the map, in its own pixels.
  const zoomBy = (factor, x = map.clientWidth / 2, y = map.clientHeight / 2) => {
    const next = Math.min(MOST, Math.max(1, zoom * factor));
    left = x - (x - left) * next / zoom;
    top = y - (y - top) * next / zoom;
    zoom = next;
    place();
  };
  const move = (x, y) => { left += x; top += y; place(); };
  const reset = () => { zoom = 1; place(); };
  const within = (event) => {
    const box = map.getBoundingClientRect();
    return [event.clientX - box.left - map.clientLeft, event.clientY - box.top - map.clientTop];
  };

  const held = new Map();
  map.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    held.set(event.pointerId, within(event));
    map.setPointerCapture(event.pointerId);
    map.classList.add("moving");
  });
  map.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const now = within(event);
    const other = [...held].find(([id]) => id !== event.pointerId)?.[1];
    held.set(event.pointerId, now);
    if (other) {
      const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      zoomBy(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else {
      move(now[0] - before[0], now[1] - before[1]);
    }
  });
  for (const end of ["pointerup", "pointercancel"]) {
    map.addEventListener(end, (event) => {
      held.delete(event.pointerId);
      map.classList.toggle("moving", held.size > 0);
    });
  }
  map.addEventListener("dblclick", (event) => zoomBy(event.shiftKey ? 0.5 : 2, ...within(event)));
  map.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoomBy(2 ** (-event.deltaY / 200), ...within(event));
  }, { passive: false });
  const keys = {
    "+": () => zoomBy(1.5), "=": () => zoomBy(1.5), "-": () => zoomBy(1 / 1.5), "0": reset,
    ArrowLeft: () => move(60, 0), ArrowRight: () => move(-60, 0), ArrowUp: () => move(0, 60), ArrowDown: () => move(0, -60),
  };
  map.addEventListener("keydown", (event) => {
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  });

  document.querySelector("#closer").addEventListener("click", () => zoomBy(1.5));
  document.querySelector("#further").addEventListener("click", () => zoomBy(1 / 1.5));
  document.querySelector("#all").addEventListener("click", reset);
  opacity?.addEventListener("input", () => layers.style.setProperty("--opacity", opacity.value / 100));
  // Classes are shown or hidden by their boxes.
  for (const box of document.querySelectorAll(".keys input")) {
    const shown = () => {
      for (const image of layers.querySelectorAll(`img[data-class="${box.value}"]`)) image.hidden = !box.checked;
    };
    box.addEventListener("change", shown);
    shown();
  }
  addEventListener("resize", place);
  for (const part of document.querySelectorAll("[data-live]")) part.hidden = false;
  map.classList.add("live");
  map.tabIndex = 0;
  place();
})();
