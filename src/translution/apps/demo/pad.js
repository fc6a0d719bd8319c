// The canvas with the digit: dragged with mouse, finger or pen, or moved with the arrow keys.
// It moves at once here; the server gets the places ("moved") and the patch ("looked").
const SCALE = 12;
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

export default {
  template: `
    <div class="pad" tabindex="0" role="application" :aria-label="label" aria-describedby="pad-help"
         @keydown="key">
      <canvas ref="canvas" role="img" :aria-label="alt" :width="pixels" :height="pixels"
              @pointerdown="down" @pointermove="move" @pointerup="up" @pointercancel="up"></canvas>
    </div>`,
  // size: of the canvas, in pixels. patch: side of a patch; 0: there are none.
  // scene: {digit: side·side values 0 to 1, side, row, column, stamp}. chosen: the patch.
  props: { size: Number, patch: Number, scene: Object, chosen: Number, label: String, alt: String },
  data: () => ({ row: 0, column: 0, at: 0, held: null }),
  computed: {
    pixels() { return this.size * SCALE; },
    most() { return this.size - this.scene.side; },
    across() { return this.patch ? this.size / this.patch : 0; },
  },
  watch: {
    scene(now, before) { if (now.stamp !== before.stamp) this.take(); },
    chosen(now) { this.at = now; this.draw(); },
    size() { this.$nextTick(this.take); },
    patch() { this.draw(); },
  },
  mounted() { this.at = this.chosen; this.take(); },
  updated() { this.draw(); },
  methods: {
    take() {
      this.held = null;
      [this.row, this.column] = [this.scene.row, this.scene.column];
      this.draw();
    },
    draw() {
      const context = this.$refs.canvas?.getContext("2d");
      if (!context) return;
      const { digit, side } = this.scene;
      context.fillStyle = "#000";
      context.fillRect(0, 0, this.pixels, this.pixels);
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          const grey = Math.round(255 * digit[y * side + x]);
          context.fillStyle = `rgb(${grey},${grey},${grey})`;
          context.fillRect((this.column + x) * SCALE, (this.row + y) * SCALE, SCALE, SCALE);
        }
      }
      const step = this.patch * SCALE;
      context.strokeStyle = "rgba(255,255,255,.22)";
      context.lineWidth = 1;
      context.beginPath();
      for (let i = step; step && i < this.pixels; i += step) {
        context.moveTo(i, 0); context.lineTo(i, this.pixels);
        context.moveTo(0, i); context.lineTo(this.pixels, i);
      }
      context.stroke();
      const colours = getComputedStyle(this.$refs.canvas);
      context.strokeStyle = colours.getPropertyValue("--frame");
      context.lineWidth = 2;
      context.setLineDash([6, 4]);
      context.strokeRect(this.column * SCALE, this.row * SCALE, side * SCALE, side * SCALE);
      context.setLineDash([]);
      if (step) {
        context.strokeStyle = colours.getPropertyValue("--chosen");
        context.lineWidth = 3;
        const [y, x] = [Math.floor(this.at / this.across), this.at % this.across];
        context.strokeRect(x * step + 1.5, y * step + 1.5, step - 3, step - 3);
      }
    },
    put(row, column) {
      const clamp = (value) => Math.min(Math.max(Math.round(value), 0), this.most);
      [row, column] = [clamp(row), clamp(column)];
      if (row === this.row && column === this.column) return;
      [this.row, this.column] = [row, column];
      this.draw();
      this.$emit("moved", { row, column, stamp: this.scene.stamp });
    },
    look(row, column) {
      if (!this.patch || Math.min(row, column) < 0 || Math.max(row, column) >= this.across) return;
      const at = row * this.across + column;
      if (at === this.at) return;
      this.at = at;
      this.draw();
      this.$emit("looked", { patch: at });
    },
    where(event) {
      const box = this.$refs.canvas.getBoundingClientRect();
      const each = this.size / box.width;
      return [(event.clientY - box.top) * each, (event.clientX - box.left) * each];
    },
    down(event) {
      if (!event.isPrimary) return; // a second finger
      const [y, x] = this.where(event);
      const inside = (value, from) => value >= from - 1 && value <= from + this.scene.side + 1;
      if (inside(y, this.row) && inside(x, this.column)) {
        this.held = [y - this.row, x - this.column];
        this.$refs.canvas.setPointerCapture(event.pointerId);
      }
      this.move(event);
    },
    move(event) {
      if (!event.isPrimary) return;
      const [y, x] = this.where(event);
      if (this.held) this.put(y - this.held[0], x - this.held[1]);
      if (this.patch) this.look(Math.floor(y / this.patch), Math.floor(x / this.patch));
    },
    up(event) { if (event.isPrimary) this.held = null; },
    key(event) {
      const step = STEPS[event.key];
      if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      if (event.shiftKey) {
        const [y, x] = [Math.floor(this.at / this.across), this.at % this.across];
        this.look(y + step[0], x + step[1]);
      } else {
        this.put(this.row + step[0], this.column + step[1]);
      }
    },
  },
};
