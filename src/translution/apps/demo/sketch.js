// A square to draw a digit in. The server gets all lines ("drawn"), points as (x, y) from 0 to 1.
// A line that leaves the square ends there; another begins where it comes back.
const SIDE = 256;
const PAUSE = 80; // milliseconds between two messages

export default {
  template: `
    <canvas class="sketch" ref="canvas" role="img" :aria-label="label" :width="side" :height="side"
            @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="up"></canvas>`,
  props: { label: String, blank: Number }, // blank: it is cleared when this changes
  data: () => ({ side: SIDE }),
  created() { [this.lines, this.drawing, this.timer] = [[], false, null]; },
  mounted() { this.draw(); },
  unmounted() { clearTimeout(this.timer); },
  watch: {
    blank() {
      [this.lines, this.drawing] = [[], false];
      clearTimeout(this.timer);
      this.timer = null;
      this.draw();
    },
  },
  methods: {
    draw() {
      const context = this.$refs.canvas.getContext("2d");
      context.fillStyle = "#000";
      context.fillRect(0, 0, SIDE, SIDE);
      [context.strokeStyle, context.lineWidth] = ["#fff", SIDE / 8];
      [context.lineCap, context.lineJoin] = ["round", "round"];
      for (const line of this.drawn()) {
        context.beginPath();
        context.moveTo(line[0][0] * SIDE, line[0][1] * SIDE);
        for (const [x, y] of line) context.lineTo(x * SIDE, y * SIDE);
        context.stroke();
      }
    },
    add(event) {
      const box = this.$refs.canvas.getBoundingClientRect();
      for (const one of event.getCoalescedEvents?.() || []) this.point(one, box);
      this.point(event, box);
      this.draw();
      if (this.drawn().length === 0) return;
      this.timer ??= setTimeout(() => {
        this.timer = null;
        this.$emit("drawn", { lines: this.drawn(), blank: this.blank });
      }, PAUSE);
    },
    point(event, box) {
      const point = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
      const inside = point.every((value) => value >= 0 && value <= 1);
      if (inside) this.lines.at(-1).push(point.map((value) => Math.round(1000 * value) / 1000));
      else if (this.lines.at(-1).length) this.lines.push([]);
    },
    drawn() { return this.lines.filter((line) => line.length); },
    down(event) {
      if (!event.isPrimary) return; // a second finger, or the palm
      this.$refs.canvas.setPointerCapture(event.pointerId);
      this.drawing = true;
      this.lines.push([]);
      this.add(event);
    },
    move(event) { if (this.drawing && event.isPrimary) this.add(event); },
    up(event) { if (event.isPrimary) this.drawing = false; },
  },
};
