"use strict";
// The page of an explanation: which scores are shown, the way to the highest, and the map of a whole document.
(() => {
  const find = id => document.getElementById(id);
  const data = JSON.parse(find("data").textContent);
  const selects = ["label", "method", "layer"].map(find);
  const [label, method, layer] = selects;
  const text = find("document"), map = find("map"), mark = find("window");
  const passages = text ? [...text.querySelectorAll(".p")] : [];
  const parts = text ? [...text.querySelectorAll(".part")] : [];
  const overlays = [...document.querySelectorAll(".overlay")];
  const SVG = "http://www.w3.org/2000/svg";
  let shown = 0, place = -1;

  function chosen() {
    const number = Number(label.value), depth = layer ? Number(layer.value) : null;
    return data.scores.findIndex(one => one.method === method.value &&
      (one.label === null || one.label === number) && (one.layer === null || one.layer === depth));
  }

  const className = step => step === 0 ? "p" : `p ${step > 0 ? "f" : "a"}${Math.abs(step)}`;
  const oneLine = words => {
    const line = words.replace(/\s+/g, " ").trim();
    return line.length > 160 ? `${line.slice(0, 159)}…` : line;
  };

  function describe(number) {
    return text ? oneLine(passages[number].textContent) : data.places[number];
  }

  function fillTop() {
    const top = data.scores[shown].top, prefix = text ? "#p" : "#r";
    find("top").replaceChildren(...top.map(([number, score]) => {
      const item = document.createElement("li"), link = document.createElement("a"), value = document.createElement("b");
      link.href = prefix + number;
      value.textContent = score;
      const page = data.pages && data.pages[number];
      link.append(value, ` ${page ? `page ${page}: ` : ""}${describe(number)}`);
      item.append(link);
      return item;
    }));
    find("none").hidden = top.length > 0;
    place = -1;
    tellPlace();
  }

  function tellPlace() {
    const count = data.scores[shown].top.length;
    find("place").textContent = place < 0 ? `top ${count}` : `${place + 1} of ${count}`;
  }

  function markDocument() {
    const { steps, top } = data.scores[shown];
    passages.forEach((passage, number) => {
      const name = className(steps[number]);
      if (passage.className !== name) passage.className = name;
    });
    text.querySelectorAll("[data-rank]").forEach(passage => passage.removeAttribute("data-rank"));
    top.forEach(([number], index) => passages[number].setAttribute("data-rank", index + 1));
    drawMap();
  }

  function markImage() {
    overlays.forEach((overlay, index) => overlay.classList.toggle("away", index !== shown));
    find("frames").replaceChildren(...data.scores[shown].top.flatMap(([number], index) => {
      const [x, y, width, height] = data.boxes[number];
      const frame = document.createElementNS(SVG, "rect"), rank = document.createElementNS(SVG, "text");
      frame.id = `r${number}`;
      for (const [name, value] of Object.entries({ x, y, width, height })) frame.setAttribute(name, value);
      rank.setAttribute("x", x + 3);
      rank.setAttribute("y", y > 30 ? y - 5 : y + height + 24);
      rank.textContent = index + 1;
      return [frame, rank];
    }));
  }

  function show() {
    shown = Math.max(0, chosen());
    if (layer) layer.disabled = method.value !== "rows";
    find("same").hidden = label.options.length < 2 || data.scores[shown].label !== null;
    let measured = false;
    document.querySelectorAll(".curve").forEach(curve => {
      curve.hidden = Number(curve.dataset.scores) !== shown || curve.dataset.label !== label.value;
      measured ||= !curve.hidden;
    });
    find("unmeasured").hidden = measured;
    fillTop();
    if (text) markDocument(); else markImage();
  }

  function jump(number) {
    const rank = data.scores[shown].top.findIndex(([one]) => one === number);
    if (rank >= 0) place = rank;
    tellPlace();
    if (!text) {
      document.querySelectorAll("#frames rect").forEach(frame => frame.classList.toggle("now", frame.id === `r${number}`));
      find(`r${number}`).scrollIntoView({ block: "nearest" });
      return;
    }
    const passage = passages[number];
    passage.tabIndex = -1;
    passage.focus({ preventScroll: true });
    // Parts out of sight have a height that is guessed: those around the passage get theirs before it is scrolled to.
    const part = parts.indexOf(passage.closest(".part"));
    for (const near of parts.slice(Math.max(0, part - 1), part + 2)) near.style.contentVisibility = "visible";
    passage.scrollIntoView({ block: "center" });
  }

  function step(by) {
    const top = data.scores[shown].top;
    if (!top.length) return;
    place = place < 0 ? (by > 0 ? 0 : top.length - 1) : (place + by + top.length) % top.length;
    jump(top[place][0]);
  }

  function drawMap() {
    const { width, height } = map.getBoundingClientRect();
    if (!height) return;
    const scale = devicePixelRatio || 1, brush = map.getContext("2d"), style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(name).trim();
    map.width = width * scale;
    map.height = height * scale;
    brush.scale(scale, scale);
    const { steps, top } = data.scores[shown];
    // The mean step of each line of pixels: for the answer from the left, against it from the right.
    for (const [sign, name] of [[1, "--for"], [-1, "--against"]]) {
      const lines = new Float64Array(Math.ceil(height) + 1);
      steps.forEach((step, number) => {
        if (step * sign <= 0) return;
        const first = height * data.starts[number] / data.length, last = height * data.stops[number] / data.length;
        for (let y = Math.floor(first); y < last; y++) lines[y] += Math.abs(step) * (Math.min(last, y + 1) - Math.max(first, y));
      });
      const most = Math.max(1, ...lines);
      brush.fillStyle = `rgb(${colour(name)})`;
      lines.forEach((strength, y) => {
        const wide = width * strength / most * .5;
        brush.fillRect(sign > 0 ? 0 : width - wide, y, wide, 1);
      });
    }
    brush.fillStyle = colour("--ink");
    for (const [number] of top) brush.fillRect(0, height * data.starts[number] / data.length, width, 1.5);
    followScroll();
  }

  // The character of the document at a height of the window, by the parts around it.
  function characterAt(y) {
    let low = 0, high = parts.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (parts[middle].getBoundingClientRect().bottom > y) high = middle; else low = middle + 1;
    }
    const { top, height } = parts[low].getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (y - top) / (height || 1)));
    const end = low + 1 < parts.length ? data.parts[low + 1] : data.length;
    return data.parts[low] + share * (end - data.parts[low]);
  }

  function followScroll() {
    const height = map.clientHeight, first = characterAt(0), last = characterAt(innerHeight);
    mark.style.transform = `translateY(${height * first / data.length}px)`;
    mark.style.height = `${Math.max(8, height * (last - first) / data.length)}px`;
  }

  function goTo(event) {
    const { top, height } = map.getBoundingClientRect();
    const wanted = data.length * Math.min(1, Math.max(0, (event.clientY - top) / height));
    let low = 0, high = data.starts.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (data.starts[middle] <= wanted) low = middle; else high = middle - 1;
    }
    jump(low);
  }

  document.querySelectorAll(".controls, .map, .keys").forEach(part => { part.hidden = false; });
  selects.filter(Boolean).forEach(select => select.addEventListener("change", show));
  find("next").addEventListener("click", () => step(1));
  find("previous").addEventListener("click", () => step(-1));
  find("top").addEventListener("click", event => {
    const link = event.target.closest("a");
    if (!link) return;
    event.preventDefault();
    history.replaceState(null, "", link.hash);
    jump(Number(link.hash.slice(2)));
  });
  if (text) {
    text.addEventListener("keydown", event => {
      if (event.ctrlKey || event.altKey || event.metaKey || (event.key !== "n" && event.key !== "p")) return;
      event.preventDefault();
      step(event.key === "n" ? 1 : -1);
    });
    let waiting = false;
    addEventListener("scroll", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; followScroll(); });
    }, { passive: true });
    addEventListener("resize", drawMap);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
    map.addEventListener("click", goTo);
    drawMap();
  } else {
    find("opacity").addEventListener("input", event => {
      overlays.forEach(overlay => { overlay.style.opacity = event.target.value / 100; });
    });
    const maps = find("maps");
    if (maps) maps.addEventListener("change", () => {
      document.querySelectorAll(".maps").forEach(group => { group.hidden = group.dataset.layer !== maps.value; });
    });
  }
  show(); // what is selected, which a browser may have kept of an earlier visit
  tellPlace();
})();
